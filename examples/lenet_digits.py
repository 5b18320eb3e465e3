"""A LeNet of NumPy layers learns handwritten digits (LeCun et al. 1998): python examples/lenet_digits.py"""

import numpy as np
from sklearn.datasets import load_digits

from numpy_ref import Adam, Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential, cross_entropy, no_grad

image, label = load_digits(return_X_y=True)
image = image.reshape(-1, 8, 8, 1).astype(np.float32) / 16  # [N, H, W, C]
rng = np.random.default_rng(0)
test, train = np.split(rng.permutation(len(image)), [360])
model = Sequential(
    *(Conv2d(1, 6, 3, padding=1, bias=True, rng=rng), ReLU(), MaxPool2d(2)),  # [N, 4, 4, 6]
    *(Conv2d(6, 16, 3, padding=1, bias=True, rng=rng), ReLU(), MaxPool2d(2), Flatten()),  # [N, 64]
    *(Linear(64, 84, rng=rng), ReLU(), Linear(84, 10, rng=rng)),
)
optimizer = Adam(model.parameters(), lr=1e-2)
for _epoch in range(20):
    for batch in np.array_split(rng.permutation(train), len(train) // 32):
        optimizer.zero_grad()
        loss, dlogits = cross_entropy(model.forward(image[batch], train=True), label[batch])
        model.backward(dlogits)
        optimizer.step()
with no_grad():
    accuracy = (model.forward(image[test]).argmax(1) == label[test]).mean()
print(f"test accuracy {accuracy:.3f}")
