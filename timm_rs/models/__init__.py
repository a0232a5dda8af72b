"""The rs_* models, and the networks that come with the package"""
