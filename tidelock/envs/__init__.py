"""Environments: families of tasks, each a set of tools, a task and a verifier given to the one agent."""
