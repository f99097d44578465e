"""The phases of a run; each is a function (config, run folder) -> result that reads and writes files."""
