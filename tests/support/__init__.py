"""What several test modules share: small models, an oracle, and the support table of a test run."""
