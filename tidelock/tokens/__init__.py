"""Tokens and traces: messages, templates, tokenizers, the trace graph and its journal.

Knows nothing of the other parts and nothing of torch. The `Policy` protocol lives here too, because every
part that talks to a model (agent, service, RL) speaks it and none of them may import the engine.
"""
