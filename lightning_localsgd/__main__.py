"""``python -m lightning_localsgd`` is ``lightning-localsgd``."""

from lightning_localsgd.cli import main

if __name__ == "__main__":
    main()
