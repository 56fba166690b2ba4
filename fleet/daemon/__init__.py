"""The controller that runs: publishes orders, records what devices report, keeps metadata fresh."""
