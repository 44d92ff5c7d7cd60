"""The loop: from consented traces to the next model, through the gate, and back if need be."""
