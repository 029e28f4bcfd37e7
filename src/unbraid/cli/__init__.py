"""The command line."""

from unbraid.cli.commands import app as app
from unbraid.cli.commands import main as main
