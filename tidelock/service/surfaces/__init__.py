"""The public APIs, one file each: what clients send becomes an `Ask`, what the answer says becomes their events."""
