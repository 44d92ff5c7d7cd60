/* Threads that share a loop's tasks, for steps of a few microseconds. An OpenMP loop ends when its last thread has arrived,
 * even one that found nothing to do and was asleep or off the processor; here whoever is awake takes the tasks, and a loop
 * ends with the last task. Which thread computes a task never changes a bit of it. */
#pragma once

/* work(arg, t) for every t < tasks, by this thread and those that come. One loop at a time is shared; a second caller, or a
 * caller with one thread (omp_get_max_threads), does its own alone. Tasks must not call it again. */
void tl_share(long tasks, void (*work)(const void *arg, long task), const void *arg);

#define WORTH_SHARING 60000 /* multiply-adds in a loop: a few microseconds */
