"""`fera-ext info`: is it fast here, and if not, why?"""
