"""The claims about backbones and heads, whose networks are seen from outside."""
