"""Answers to scores: IFEval, GSM8K, multiple choice."""
