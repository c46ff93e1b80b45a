"""HTTP itself: connections, what is around every request, errors in the one shape. It knows no route."""
