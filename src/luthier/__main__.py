"""`python -m luthier` is `luthier`; torchrun starts it so."""

from luthier.cli.app import main

if __name__ == "__main__":
    main()
