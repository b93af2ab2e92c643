"""The conformance suite: requirements, tests derived from them, and the machine that runs them against a target.

A run of one target is one pytest session with the plugin `vlmqual_conformance.plugin`; `vlmqual conformance` starts
one for each target and one for each library that the targets use.
"""
