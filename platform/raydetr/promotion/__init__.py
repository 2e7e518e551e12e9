"""Promotion of a challenger to champion: the gate, and the ledger of alias moves."""
