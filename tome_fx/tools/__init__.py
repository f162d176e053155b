"""What stands on the public verbs: counts of what is saved, a look at what is compiled, a ratio that follows steps."""
