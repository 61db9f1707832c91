"""Grand Ambassador: a dynamic link ambassador for Docker containers.

The package's layers import downwards only (tests/unit/test_layers.py keeps it so):

    cli -> supervisor, discovery -> reconcile, worker, status -> control, sockets -> model

The compiled relay loops (_splice, _datagram) import nothing from the package.
"""

__version__ = "0.1.0"
