"""`python -m deploy` is `qfleet`."""

from deploy.cli import entry_point

if __name__ == "__main__":
    entry_point()
