"""Draw a page of all named masks: ``python -m stattn.masks``."""

from stattn.pictures import main

main()
