"""The whole job: a run makes each of its results once and keeps it in a folder."""
