"""Other machines by TVM's own RPC: a tracker or a server, sessions on it, packages that run there, tiles that are
measured there.
"""
