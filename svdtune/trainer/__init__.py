"""The only place that knows all stages: builds them from a Config, runs the loop, keeps the run folder."""
