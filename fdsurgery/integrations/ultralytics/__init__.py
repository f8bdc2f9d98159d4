"""Networks of Ultralytics, which `YOLO(...)` holds and whose trainer builds others.

library  what the register knows of it
guards   training and copying of weights, refused where dynamic layers would be lost
"""
