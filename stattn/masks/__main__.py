"""Draw a page of all named masks: ``python -m stattn.masks``."""

from stattn.masks.pictures import main

main()
