"""Files of `lq quantize` against llama.cpp's own recipes at equal bytes."""
