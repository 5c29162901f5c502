"""`python -m luthier` is `luthier`; torchrun starts it so."""

from luthier.cli.app import main

main()
