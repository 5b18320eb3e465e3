"""Runs that are killed, raced and starved, again and again: what do they lose?"""
