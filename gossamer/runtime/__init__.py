"""Executors: what turns a ScheduledBatch into a StepResult."""
