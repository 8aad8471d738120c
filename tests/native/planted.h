// The bug to run with, by its number, of those that a build has planted in it (tests/planting.py); 0: none.
#pragma once

inline int planted_bug = 0;
