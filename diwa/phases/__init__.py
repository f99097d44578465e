"""The phases of a run: functions (config, run folder) -> result that read and write its files."""
