def fault(schema):
    return None
