"""python -m lmfuse"""

from lmfuse.cli import main

main()
