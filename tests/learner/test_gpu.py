"""The learner's GPU path against its CPU path. Needs a GPU; skipped where there is none."""

import numpy as np
import pytest
import torch

from common import params as params_module
from common.config import NetworkConfig
from common.errors import NonFiniteError
from learner.update import RecordedFunction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NETWORKS = {
    "expectation": NetworkConfig(hidden_sizes=(32,), dueling=True),
    "categorical": NetworkConfig(hidden_sizes=(32,), distribution="categorical"),
    "quantile": NetworkConfig(hidden_sizes=(32,), distribution="quantile", num_quantiles=8),
}


def params_after(make_learner, num_updates, **settings):
    learner, shards, _ = make_learner(**settings)
    learner.start()
    try:
        while learner.updates < num_updates:
            learner.step(10.0)
        stats = learner.stats()
        return params_module.flatten(learner._online), stats, shards[0].updates
    finally:
        learner.close()


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("compilation", ["off", "cuda_graph"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_gpu_learns_what_a_cpu_learns(make_learner, kind, compilation, optimizer):
    """Also late reports: the same priorities in the same order, all of them once the learner has settled."""
    settings = {"network": NETWORKS[kind], "optimizer": optimizer, "target_period_updates": 7}
    cpu, cpu_stats, cpu_updates = params_after(make_learner, 40, **settings)
    gpu, gpu_stats, gpu_updates = params_after(make_learner, 40, device="cuda", compilation=compilation, **settings)
    np.testing.assert_allclose(gpu, cpu, rtol=0, atol=2e-4)
    assert gpu_stats.loss == pytest.approx(cpu_stats.loss, rel=1e-2)
    assert len(gpu_updates) == len(cpu_updates) == 40
    for mine, other in zip(gpu_updates, cpu_updates, strict=True):
        np.testing.assert_array_equal(mine.item_id, other.item_id)
        np.testing.assert_allclose(mine.priority, other.priority, rtol=2e-2, atol=2e-3)


def test_a_nan_on_a_gpu_stops_the_learner_before_anything_leaves_it(make_learner, tmp_path):
    learner, (shard,), store = make_learner(device="cuda", publish_period_updates=1_000)
    shard.r_t = np.full(8, 3e38)
    learner._update._objective._td_loss = lambda td_error: td_error.square()
    learner.step()
    with pytest.raises(NonFiniteError):
        learner.step()
    assert store.published == [] and list(tmp_path.glob("bad_batch_*"))


def test_a_recorded_function_sees_new_inputs_and_reuses_its_outputs():
    stream = torch.cuda.Stream()
    recorded = RecordedFunction(lambda x, y: (x * y, x + y))
    with torch.cuda.stream(stream):
        for i in range(8):
            x, y = torch.full((4,), float(i), device="cuda"), torch.full((4,), 2.0, device="cuda")
            product, total = recorded(x, y)
            assert product.tolist() == [2.0 * i] * 4 and total.tolist() == [i + 2.0] * 4
