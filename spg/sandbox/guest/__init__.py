"""What runs in the cage. `spg.sandbox.host` starts it as a script; the rest of the project never imports it.

Three processes:

- The **keeper**, outside, builds the cage and clears up after it (`keeper`).
- The **examiner**, inside, runs the tests and reports how they ended (`examiner`). If the kernel grants a
  process namespace, the examiner is its first process, so that its end ends all others.
- The **candidate**, inside too, runs the program under test (`candidate`). A copy of it serves each test.

Examiner and candidate share no memory: calls and values travel over a socket as JSON (`rpc`, `values`). So
nothing that the program does to its own interpreter (leave it, patch builtins, walk through frames) reaches
a test or its report.

Values of the standard data types cross by value. If a call changes a container, the change is copied back.
Functions and iterators stay where they are and are called from afar. So do objects of the program's own
classes, and the tests can do more with them than call them only if they name a class. A method that the
program wrote, such as an `__eq__` that always agrees, therefore never decides a test of functions. The
program may only call what a test handed to it, and it sends nothing but values.

A test cannot hand over objects of its own classes or open files, use `isinstance(x, tuple)` on an object
whose class the program wrote, reach the attributes of a function, or send into a generator.

The guest uses the standard library only. Its modules import each other relatively, because the package has
another name inside the cage. All of them are loaded before the walls go up, since their files are not
visible afterwards.
"""
