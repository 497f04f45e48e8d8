"""object_store"""
