"""What runtimes accept, as data: one TOML file a target, read by `ptqjax.config.target`."""
