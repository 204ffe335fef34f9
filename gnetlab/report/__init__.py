"""Reporting: notebooks through papermill, claims, the HTML page. Imports no other room."""
