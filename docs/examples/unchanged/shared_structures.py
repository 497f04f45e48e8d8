"""Numbers, text and structures in shared memory, in the style of the documentation's: with a lock and without."""

from ctypes import Structure, c_double
from multiprocessing import Lock, Process
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.sharedctypes import Array, Value


class Point(Structure):
    _fields_ = [("x", c_double), ("y", c_double)]


def modify(number, ratio, text, points, segment):
    number.value **= 2
    ratio.value **= 2
    text.value = text.value.upper()
    for point in points:
        point.x **= 2
        point.y **= 2
    segment.buf[:3] = bytes(3 * byte for byte in segment.buf[:3])
    segment.close()


def main():
    lock = Lock()
    number = Value("i", 7)
    ratio = Value(c_double, 1 / 3, lock=False)
    text = Array("c", b"hello world", lock=lock)
    points = Array(Point, [(1.875, -6.25), (-5.75, 2.0), (2.375, 9.5)], lock=lock)
    segment = SharedMemory(create=True, size=3)
    segment.buf[:3] = bytes([1, 2, 3])

    process = Process(target=modify, args=(number, ratio, text, points, segment))
    process.start()
    process.join()
    print(process.exitcode, number.value, ratio.value, text.value, bytes(segment.buf[:3]))
    print([(point.x, point.y) for point in points])
    segment.close()
    segment.unlink()


if __name__ == "__main__":
    main()
