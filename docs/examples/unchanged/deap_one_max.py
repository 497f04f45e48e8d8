"""A genetic algorithm with DEAP, as its documentation has it: `toolbox.register("map", pool.map)`."""

import multiprocessing
import random

from deap import algorithms, base, creator, tools

BITS = 60

creator.create("FitnessMax", base.Fitness, weights=(1.0,))
creator.create("Individual", list, fitness=creator.FitnessMax)


def count_ones(individual: list[int]) -> tuple[int]:
    return (sum(individual),)


def make_toolbox() -> base.Toolbox:
    toolbox = base.Toolbox()
    toolbox.register("bit", random.randint, 0, 1)
    toolbox.register("individual", tools.initRepeat, creator.Individual, toolbox.bit, BITS)
    toolbox.register("population", tools.initRepeat, list, toolbox.individual)
    toolbox.register("evaluate", count_ones)
    toolbox.register("mate", tools.cxTwoPoint)
    toolbox.register("mutate", tools.mutFlipBit, indpb=0.05)
    toolbox.register("select", tools.selTournament, tournsize=3)
    return toolbox


def main() -> None:
    random.seed(64)
    toolbox = make_toolbox()
    population = toolbox.population(n=80)
    best = tools.HallOfFame(1)
    statistics = tools.Statistics(lambda individual: individual.fitness.values[0])
    statistics.register("best", max)
    statistics.register("worst", min)
    with multiprocessing.Pool(2) as pool:
        toolbox.register("map", pool.map)
        _, log = algorithms.eaSimple(
            population, toolbox, cxpb=0.5, mutpb=0.2, ngen=15, stats=statistics, halloffame=best, verbose=False
        )
    print(log)
    print("best:", "".join(map(str, best[0])))


if __name__ == "__main__":
    main()
