"""Measuring: every function returns a tidy frame. Imports gnetlab.net, never matplotlib."""
