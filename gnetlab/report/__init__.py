"""Reporting: notebooks through papermill, claims, the HTML page. Imports no other room.

plan, runner     what will be run; running it
cache            what need not be run again
worker, kernel, preload   a notebook in a process of its own
cluster, task    the same on a Dask cluster
claims           the paper's claims and their verdicts
executed, page   executed notebooks, and the report's pages
manifest, machine, compare   what made a report, and what moved between two
"""
