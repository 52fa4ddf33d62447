"""From a command line to a running server: options, checked models, the engine and the app around it."""
