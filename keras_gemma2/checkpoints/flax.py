def read_source(name, path):
    return None
