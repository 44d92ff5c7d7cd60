"""A toolset that tries everything it must not be able to do. Runs in the confined worker."""

import os
import socket
import time

from tidelock.sandbox.toolset import ToolFault


class Hostile:
    def call(self, world, name, arguments):
        return getattr(self, name, self.unknown)(world, **arguments)

    def unknown(self, world, **_):
        raise ToolFault("no such tool")

    def remember(self, world, value):
        world["value"] = value
        return "ok"

    def recall(self, world):
        return str(world.get("value"))

    def write(self, world, path):
        with open(path, "w") as f:
            f.write("x")
        return "written"

    def listen(self, world, kind):
        socket.socket(getattr(socket, kind), socket.SOCK_DGRAM)
        return "open"

    def sleep(self, world, seconds):
        time.sleep(seconds)
        return "awake"

    def die(self, world):
        os._exit(3)

    def shout(self, world):
        print("this must not reach the protocol")
        return "quiet"

    def attempt(self, world, name, **arguments):
        try:
            return getattr(self, name)(world, **arguments)
        except OSError as e:
            return f"denied: {e.errno}"


TOOLSET = Hostile()
