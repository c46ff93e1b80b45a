"""The worker process: heavy work, told line by line to whoever started it. `python -m tenon.worker KIND TARGET`."""
