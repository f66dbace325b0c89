"""The Python side of Pergola's native engine: hosts a ServerApp or a ClientApp in this process.

It speaks to the runner over descriptor 3 (docs/native-protocol.md). boot.py imports it as ``_pergola_native``, so
that neither its folder nor its module names are in the way of the app's.
"""
