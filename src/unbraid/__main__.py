"""Run the command line as `python -m unbraid`."""

from unbraid.cli import main

main()
