"""The processes that train one run together, one a device."""
