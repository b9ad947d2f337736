"""What a state root keeps of images: content by digest, unpacked layers, and how long they stay."""
