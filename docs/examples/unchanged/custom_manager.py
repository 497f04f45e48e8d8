"""A manager with classes of its own, in the style of the documentation's: typeids, `exposed`, proxies, iterators."""

import operator
from multiprocessing import Process
from multiprocessing.managers import BaseManager, BaseProxy, NamespaceProxy


class Account:
    """Lives in the manager's process; everyone else has proxies of it."""

    def __init__(self, owner):
        self.owner = owner
        self._balance = 0

    def deposit(self, amount):
        self._balance += amount
        return self._balance

    def balance(self):
        return self._balance

    def withdraw(self, amount):
        if amount > self._balance:
            raise ValueError(f"{self.owner} has only {self._balance}")
        self._balance -= amount

    def _audit(self):
        return "audited"


class GeneratorProxy(BaseProxy):
    _exposed_ = ("__next__",)

    def __iter__(self):
        return self

    def __next__(self):
        return self._callmethod("__next__")


class AccountProxy(NamespaceProxy):
    """With attributes as well as methods."""

    _exposed_ = ("__getattribute__", "__setattr__", "deposit", "balance", "withdraw")

    def deposit(self, amount):
        return self._callmethod("deposit", (amount,))

    def balance(self):
        return self._callmethod("balance")

    def withdraw(self, amount):
        return self._callmethod("withdraw", (amount,))


def squares(count):
    for number in range(count):
        yield number**2


class Bank(BaseManager):
    pass


Bank.register("Account", Account, AccountProxy)
Bank.register("AuditedAccount", Account, exposed=("deposit", "_audit"))
Bank.register("squares", squares, GeneratorProxy)
Bank.register("get_operator", lambda: operator)


def save(account, amount):
    for _ in range(amount):
        account.deposit(1)


def main():
    with Bank() as bank:
        account = bank.Account("Ada")
        savers = [Process(target=save, args=(account, amount)) for amount in (10, 20, 30)]
        for saver in savers:
            saver.start()
        for saver in savers:
            saver.join()
        print(account.owner, "has", account.balance())
        account.owner = "Lovelace"
        try:
            account.withdraw(100)
        except ValueError as error:
            print("refused:", error)

        audited = bank.AuditedAccount("Bob")
        print(audited.deposit(5), audited._audit(), hasattr(audited, "balance"))
        print(list(bank.squares(8)))
        operators = bank.get_operator()
        print(operators.add(23, 45), operators.mul(3, 4))
        try:
            operators.truediv(1, 0)
        except ZeroDivisionError as error:
            print("ZeroDivisionError:", error)


if __name__ == "__main__":
    main()
