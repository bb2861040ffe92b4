"""One file per command: a frozen `Config` and `run(config)`. The only layer that is not pure."""
